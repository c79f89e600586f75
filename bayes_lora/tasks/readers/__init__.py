"""Readers: files of any format to tasks."""
