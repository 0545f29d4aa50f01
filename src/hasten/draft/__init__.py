"""Drafters: each proposes nodes for rows and learns from what the target accepted (engine/contracts.py, `Drafter`)."""
