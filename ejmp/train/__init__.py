"""Training: pre-train, prune, distil, fine-tune, evaluate, on one device or many."""
