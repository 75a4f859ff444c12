"""Reads pixels, full scale and pixel spacing of DICOM files, and nothing else of them.

Other kinds of images are rejected, and no error quotes the value of an element.
"""
