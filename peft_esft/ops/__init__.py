"""Tensor arithmetic of ESFT layers: torch only, no model, no PEFT."""
