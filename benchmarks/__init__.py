"""Scripts that reproduce every published figure; each prints what `docs/results.md` quotes."""
