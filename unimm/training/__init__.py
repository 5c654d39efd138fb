"""The one training loop and the steps of everything that is trained with it."""
