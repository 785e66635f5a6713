"""How a mix of stores is sampled, batched and loaded."""
