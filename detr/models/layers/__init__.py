"""What encoders, decoders and heads are made of."""
