"""The modules that ESFT puts around experts."""
