"""The command-line tools, one script each; a package so that tests can import them."""
