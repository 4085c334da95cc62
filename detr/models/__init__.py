"""The detector and the parts that it is assembled from."""
