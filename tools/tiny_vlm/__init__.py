"""How the models in ``mqc/models`` are trained (see ``tools/train_tiny_vlm.py``)."""
