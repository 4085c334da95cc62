"""From images to feature maps. One file a source of backbones."""
