"""The functions and classes of `import flexunet`; the commands call the same modules below."""
