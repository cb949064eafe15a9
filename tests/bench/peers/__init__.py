"""The peers, each a program of its own, written as its documentation shows, on the same model, data and step log."""
