"""The PEFT tuner: config, model, and what is done with adapters."""
