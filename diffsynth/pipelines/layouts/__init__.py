"""The layouts in which authors release the weights of networks that libraries name in another way."""
