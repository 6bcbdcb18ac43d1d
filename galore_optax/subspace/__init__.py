"""How a subspace is found, kept and found anew. Read `finders` first."""
