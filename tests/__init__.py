"""Tests; each folder says what for."""
