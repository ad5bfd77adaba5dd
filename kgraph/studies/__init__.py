"""Studies: reports on the published systems, each a call on the model that the user has."""
