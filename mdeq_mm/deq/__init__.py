"""Equilibria of any f."""
