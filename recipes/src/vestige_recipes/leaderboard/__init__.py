"""Every attribution method on one bank."""
