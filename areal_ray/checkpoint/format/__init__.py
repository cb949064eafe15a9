"""What stands in a checkpoint's directory: manifest, layout, shard files and their checksums."""
