"""From queries and memory to what the heads predict from. One file an idea."""
