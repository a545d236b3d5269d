"""The subcommands of `lineardit`, one module each. None of them imports torch before it runs."""
