# Sets CMAKE_CUDA_COMPILER (empty where there is none that serves; `nvcc_lacking` says why) and `toolkit_libraries`, where its libraries lie if nvcc itself
# does not know. In this order: CMAKE_CUDA_COMPILER, CUDACXX, CUDA_HOME, PATH, the usual place, PyPI's nvidia-cuda-nvcc in
# the site-packages of the Python that this is built with.

function(ask_python_for_packages found)
  find_package(Python 3 COMPONENTS Interpreter QUIET)
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
      OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE packages)
    set(${found} "${packages}" PARENT_SCOPE)
  endif()
endfunction()

if(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(nvcc "$ENV{CUDACXX}")
else()
  ask_python_for_packages(packages)
  find_program(KVSTORE_S3_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda "${packages}/nvidia/cu13"
    PATH_SUFFIXES bin)
  set(nvcc "${KVSTORE_S3_NVCC}")
endif()

set(toolkit_libraries "")
set(nvcc_lacking "no nvcc works (looked in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda and Python's packages)")
if(nvcc)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET RESULT_VARIABLE nvcc_failed)
  if(nvcc_says MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_LESS 12.0)
    set(nvcc_lacking "${nvcc} is of CUDA ${CMAKE_MATCH_1}, and C++20 takes 12.0 or newer")
    set(nvcc "")
    set(CMAKE_CUDA_COMPILER "")
  endif()
endif()
if(nvcc)
  # PyPI's packages keep in lib what nvcc looks for in lib64; the host's linker looks where LIBRARY_PATH says.
  cmake_path(GET nvcc PARENT_PATH beside)
  if(NOT EXISTS "${beside}/../lib64" AND EXISTS "${beside}/../lib/libcudart_static.a")
    get_filename_component(toolkit_libraries "${beside}/../lib" ABSOLUTE)
    set(ENV{LIBRARY_PATH} "${toolkit_libraries}:$ENV{LIBRARY_PATH}")
  endif()
  if(KVSTORE_S3_CUDA STREQUAL "AUTO" AND NOT CMAKE_CUDA_COMPILER)
    # An nvcc that cannot compile (no host compiler that suits it, half a toolkit) is none.
    set(ENV{CUDACXX} "${nvcc}")
    include(CheckLanguage)
    check_language(CUDA)
  else()
    set(CMAKE_CUDA_COMPILER "${nvcc}")
  endif()
endif()
