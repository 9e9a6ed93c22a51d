// ATen's headers include this one for names alone. The types' names stand in for a library of hundreds of megabytes;
// a real header of the same name comes first on the include path where SGCL_CUDA_INCLUDE has one.
#pragma once
typedef struct cusolverDnContext* cusolverDnHandle_t;
