"""The engine: one loop per kind of model, over the contracts of `contracts.py`; it never names a method or a model."""
