"""Pictures in, answers out: what a manifest with a picture task says, carried out around any loaded model."""
