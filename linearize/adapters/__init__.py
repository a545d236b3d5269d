"""Students on disk and on the Hub: saving, loading, merging, and the bases that they are made from."""
