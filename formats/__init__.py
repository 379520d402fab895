"""Files of others that hold data sets: annotations and images, read, checked and brought into one form."""
