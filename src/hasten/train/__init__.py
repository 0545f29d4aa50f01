"""Training on the machine at hand: text a model writes itself, losses, a resumable loop, and recipes that tie them."""
