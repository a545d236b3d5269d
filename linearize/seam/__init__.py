"""How attention is replaced inside a model whose own forward stays as it is."""
