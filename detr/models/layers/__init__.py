"""The layers of encoders, decoders and heads."""
