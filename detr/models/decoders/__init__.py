"""From queries and memory to the features that the heads predict from. One file an idea."""
