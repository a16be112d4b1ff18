"""DeepSpeed's engine and optimizer, subclassed: the only room that knows its private names."""
