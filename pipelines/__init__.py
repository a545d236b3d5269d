"""Pictures from converted pipelines, as files."""
