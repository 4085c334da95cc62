"""From feature maps to the memory that the decoder looks at. One file an idea."""
