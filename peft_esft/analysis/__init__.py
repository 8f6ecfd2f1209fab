"""What the routing of tasks looks like, and what to make of it."""

from .stability import StabilityReport, stability_report


__all__ = ["StabilityReport", "stability_report"]
