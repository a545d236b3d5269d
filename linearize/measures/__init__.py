"""What a model costs and where its attention goes, before and after conversion."""
