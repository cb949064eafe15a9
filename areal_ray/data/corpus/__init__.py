"""Prepared corpora: tokens on disk or in S3, written once and read by position."""
