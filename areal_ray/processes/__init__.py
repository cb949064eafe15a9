"""Small helper processes beside the job's own: fork server, checkpoint writer, memory keeper.

Imports config and storage; neither torch nor Ray. Nothing is imported here: these processes are to be up at once.
"""
