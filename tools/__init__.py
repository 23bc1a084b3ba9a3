"""The command-line tools, a script each; a package so that tests import them."""
