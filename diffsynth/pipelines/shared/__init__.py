"""What the files of several families share besides autoencoders; no file here is a family."""
