"""What the libraries of this process must be told before they load: memory, drivers."""
