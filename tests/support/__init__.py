"""What several tests share; tests import it as `support`, and nothing of each other."""
