"""Leveled homomorphic encryption (CKKS): a client with the secret key, a server with the weights."""

from tightrope.runtimes.ckks.config import CKKS

__all__ = ["CKKS"]
