"""Whether scores find a task or the format of its answers."""
