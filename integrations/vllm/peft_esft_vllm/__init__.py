"""Serves Expert-Specialized Fine-Tuning (ESFT) adapters in vLLM, many in one batch. Begin reading in `plugin.py`."""

__version__ = "0.1.0"
