"""Modules only: no data set is read and no string is tokenized here."""
