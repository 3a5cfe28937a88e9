"""Random changes of training windows."""
