"""Compiled synchronisation between ranks, and the compiled thread that serves other nodes."""
