"""Sources of documents: files, tables and data sets, found by name and read in parts."""
