"""Boards: which devices a machine has, where they sit and on which lines."""
